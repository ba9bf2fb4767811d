"""A teacher that runs elsewhere: a server is asked, and what it or another program computed becomes a table.

May import: capture, tables, workers; models of the trainer; schemas.
Lost without it: `import` and `ask`; teachers that this machine can load are captured all the same.
"""
