"""The experiment platform: recipes, their stages and plan, the reports and what is shared."""
