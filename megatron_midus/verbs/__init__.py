"""The verbs of the journey: functions over configurations, and what ``midus VERB`` prints. One file a verb."""
