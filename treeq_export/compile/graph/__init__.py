"""What passes, bodies and audits share: finding nodes, putting new ones in their place, sites."""
