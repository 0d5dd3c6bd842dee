"""Who may call, and what they used."""
