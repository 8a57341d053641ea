"""What a fused AdamW step consists of."""
