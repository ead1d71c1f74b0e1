"""Distillation from a teacher cache: config, collator, fused head, trainer."""
