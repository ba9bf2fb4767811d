"""From a run file to a cache, a student, and a look at one document, cell by cell.

The paths of the run file begin at the current folder. For runs/demo.toml, `make demo` fetches the models and texts.
"""

# %% Settings: the run file, and what is different this time
from xkd_pipeline import plan, preprocess, verify
from xkd_schemas import RunConfig, XkdError, open_cache
from xkd_trainer import Request, evaluate, train

run = RunConfig.load("runs/demo.toml", teacher={"codec": "int8"})

# %% What will the cache need?
plan(run)

# %% Make the cache, and train; both go on where they stopped
preprocess(run)
trained = train(run)

# %% Errors have one line: what is wrong, what was kept, what to type next
try:
    open_cache("no/such/cache")
except XkdError as error:
    message = str(error)

# %% One document: its text, the student's tokens, the teacher's signals as numpy arrays
cache = open_cache(run.cache)
row = cache[5]
row.text, row.words, row.phrases

# %%
row.student.tokens, row.teacher.tokens, row.teacher["hidden_last"].shape

# %% Is every byte as it was written, and how good is the student?
findings = verify(run)
scores = evaluate(Request(student=trained.out, data=run.documents.corpus[0], rouge=False))
