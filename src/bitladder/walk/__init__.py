"""One walk over a model's layers: who goes through them, what looks on, what is kept."""
