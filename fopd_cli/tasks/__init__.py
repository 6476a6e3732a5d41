"""Tasks: prompts and a grader. `load_task` turns a recipe's task section into one."""

from fopd_cli.tasks.base import Task
from fopd_cli.tasks.registry import load_task

__all__ = ["Task", "load_task"]
