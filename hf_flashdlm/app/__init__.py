"""A page to look at: a prompt decoded by several methods side by side, as `flashdlm app` shows it in a browser."""
