"""What torch keeps private of its autograd engine and of the nodes in its graphs: the only room that names it."""
