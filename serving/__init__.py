"""A trained model that answers: in a terminal, behind an API."""
