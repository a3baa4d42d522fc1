"""Training on Hugging Face accelerate, and the mannequin data it draws from."""
