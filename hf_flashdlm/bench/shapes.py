"""The shapes that `flashdlm bench` knows by name; imports nothing, so that its help is quick."""

# The architecture and its sizes where they are not the defaults of its configuration; `None` is the embedded model.
SHAPES = {
    "llada-8b": ("llada", {}),
    "dream-7b": ("Dream", {}),
    "llada2-mini": ("llada2_moe", {}),
    "llada-50m": (
        "llada",
        dict(d_model=512, n_layers=8, n_heads=8, n_kv_heads=8, mlp_hidden_size=1792)
        | dict(vocab_size=18432, mask_token_id=18431, eos_token_id=2, pad_token_id=2),
    ),
    "tiny": None,
}
# Sizes of Qwen2.5, which guiders of these shapes have; the vocabulary is that of the diffusion model.
GUIDER_SHAPES = {
    "qwen2.5-0.5b": dict(
        hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2
    ),
    "qwen2.5-1.5b": dict(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2
    ),
    "tiny": None,
}
# The autoregressive architecture of the same shape, by the type of the diffusion model.
TWINS = {"llada": "llama", "Dream": "qwen2"}
