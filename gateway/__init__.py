"""Gateway: admits, plans and relays requests. Holds no state that another replica would need."""
