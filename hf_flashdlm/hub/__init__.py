"""Repositories for the Hugging Face Hub: their folders and their upload."""

from .export import export_code, export_guider, export_model, export_strategy
from .space import export_space
from .upload import push


__all__ = ["export_code", "export_guider", "export_model", "export_space", "export_strategy", "push"]
