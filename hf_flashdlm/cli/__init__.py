"""The command line: arguments, streams and exit codes of `flashdlm`."""
