"""Open-vocabulary detection: objects are named by texts that may be new at run time."""
