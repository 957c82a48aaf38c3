"""What other packages take: callbacks for the places where people train, and ranks for adapters. Nothing else imports these."""
