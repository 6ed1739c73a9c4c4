"""The shapes that `flashdlm bench` knows by name; imports nothing, so that its help is quick."""

# The architectures whose configuration has these sizes by default; `None` is the embedded model.
SHAPES = {"llada-8b": "llada", "dream-7b": "Dream", "tiny": None}
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
