"""What steering does to language models: the models, the texts, and how both are judged."""
