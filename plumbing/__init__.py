"""What the commands stand on and what a reader of train_gpt2.py need not read."""
