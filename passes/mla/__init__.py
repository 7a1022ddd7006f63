"""The MLA pass: analytic initialisation and closed-form refits of multi-head latent attention."""
