"""How well a model transfers a person: measures, planted truths and the table of rows (`evaluate.evaluate`)."""
