"""`fopd new`: a recipe for given models and data.

`data.py` inspects the rows, `models.py` the pair, `recipe.py` turns both into about twenty lines, `ask.py`
asks the questions in a terminal. Assumptions are printed, one per line, and kept in the recipe as comments.
"""
