"""Whole models that tools of this kind go wrong at: each is exact, or refused in words that say what to do."""
