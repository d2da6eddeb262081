"""What a bank of fused experts does to a row's bits, and which of its configurations a server keeps to."""
