"""Repositories for the Hugging Face Hub: their folders and their upload."""
