"""A trained model that is asked something: generation, answers, evaluation."""
