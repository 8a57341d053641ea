"""Lower ranks: cutting an adapter, what an optimizer remembers of it, and cutting while it trains."""
