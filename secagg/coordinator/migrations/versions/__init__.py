"""One module a revision, numbered from 0001. A revision that was released never changes."""
