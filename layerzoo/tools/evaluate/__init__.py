"""`layerzoo evaluate`: a converted model beside its source and its controls."""
