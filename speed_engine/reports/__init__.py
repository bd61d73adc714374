"""What a person or a program reads about data, recipes and runs."""
