"""A recipe to begin with."""

TEMPLATE = """\
# A recipe to be filled in. Every other key has a default; fopd recipe --explain [SECTION] lists them.
student: {model: owner/small-model}     # a hub id or a directory; it is trained
teacher: {model: owner/large-model}     # of the same family: their tokenizers must give the same ids
task:
  name: chat                            # or math (graded), tool, swe, arithmetic, your.module:Class
  train: prompts.jsonl                  # jsonl, json, csv, parquet, a directory of them, or hf:owner/name
  # eval: held-out.jsonl                # without it some of task.train are held out
  question: messages                    # the column: a text, or a list of chat messages
sampler: {max_new_tokens: 512}          # responses are cut off there
learner: {steps: 400, batch_samples: 64, lr: 1.0e-6}
schedule: {max_lag: 4}                  # largest lag in optimizer steps; 0: sampling and learning take turns
eval: {every: 50}                       # optimizer steps between evaluations
checkpoint: {every: 100}
# placement: {mode: partition, sampler: 4, teacher: 2, learner: 2}   # devices; default: by their number
"""
