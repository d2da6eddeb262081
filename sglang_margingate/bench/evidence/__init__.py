"""Commands that gather the evidence for what the project claims."""
