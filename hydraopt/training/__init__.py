"""Fine-tuning one LoRA adapter per task."""
