# LiteRT files: exported of the merged model, quantized, checked and scored in LiteRT.
