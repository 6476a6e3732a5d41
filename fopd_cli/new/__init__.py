"""`fopd new`: a recipe for models and data that are at hand.

`data.py` looks at the rows, `models.py` at the pair, `recipe.py` writes about twenty lines of them, `ask.py`
puts the questions in a terminal. What was assumed is said, line by line, and stands in the recipe as
comments.
"""
