"""What a trained model does, and the pages that show it."""
