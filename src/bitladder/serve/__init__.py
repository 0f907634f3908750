"""The gateway: two tiers of one model behind one OpenAI-compatible endpoint, each answer with its reason.

`app.serve(settings)` runs it; `settings.ServeSettings` says with what.
"""
