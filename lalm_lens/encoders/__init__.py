"""Audio encoders: mel features in, encoder states out, every block hooked."""
