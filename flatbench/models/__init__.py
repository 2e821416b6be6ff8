"""Pretrained models and adapters: load one, adapt it, list its factors, save what was trained."""
