"""Model compression and tuning for Hugging Face models."""
