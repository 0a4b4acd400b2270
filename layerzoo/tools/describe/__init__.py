"""What a model's parts hold and cost, beside full attention: `layerzoo describe`."""
