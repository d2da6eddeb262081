"""What answers carry beside tokens: log-probabilities, the summary, the fingerprint."""
