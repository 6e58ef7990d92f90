"""Parts shared by the explorer and the live panel: traits, JavaScript, style sheet, color maps and quantized maps."""
