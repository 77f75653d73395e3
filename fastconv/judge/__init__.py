"""What an answer is worth: the only package that judges text."""
