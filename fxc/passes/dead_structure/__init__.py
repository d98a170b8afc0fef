"""The mechanism that removes what is masked."""
