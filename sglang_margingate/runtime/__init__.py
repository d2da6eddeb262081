"""What a step means: torch, no SGLang."""
