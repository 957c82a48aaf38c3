"""The remedies that refusals name: each refusal is reproduced, and what it says is done, which has to give the exact number."""
