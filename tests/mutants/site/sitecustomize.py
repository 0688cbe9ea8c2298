"""Python imports this as it starts, where ``hook.Order`` has put its folder on the path."""

from tests.mutants.hook import install

install()
