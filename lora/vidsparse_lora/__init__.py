"""LoRA fine-tuning with sparse attention: length extension and distillation."""
