"""Callbacks for the places where people train. Each file needs a package of its own, and nothing else imports them."""
