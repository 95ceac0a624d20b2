// The ten crops, cut in the browser as the server cuts them: shorter side 256, centre 256x256,
// four corners and the centre of 224x224, then their mirror images.

export const SQUARE = 256;
export const CROP = 224;
const EDGE = SQUARE - CROP;
const OFFSETS = {
  "top left": [0, 0],
  "top right": [EDGE, 0],
  "bottom left": [0, EDGE],
  "bottom right": [EDGE, EDGE],
  centre: [EDGE / 2, EDGE / 2],
};

/** The upright picture's centre square as a 256x256 canvas; null if the browser cannot show it. */
export async function centreSquare(file) {
  try {
    const picture = await createImageBitmap(file, { imageOrientation: "from-image" });
    const side = Math.min(picture.width, picture.height);
    const canvas = blank(SQUARE);
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.fillStyle = "#fff"; // transparency is shown on white, as the server does
    context.fillRect(0, 0, SQUARE, SQUARE);
    const left = (picture.width - side) / 2;
    const top = (picture.height - side) / 2;
    context.drawImage(picture, left, top, side, side, 0, 0, SQUARE, SQUARE);
    picture.close();
    return canvas;
  } catch {
    return null;
  }
}

/** One view of the square, `{position, mirrored}`, as a canvas of 224x224. */
export function cut(square, { position, mirrored }) {
  const canvas = blank(CROP);
  const context = canvas.getContext("2d");
  if (mirrored) {
    context.translate(CROP, 0);
    context.scale(-1, 1);
  }
  const [left, top] = OFFSETS[position];
  context.drawImage(square, left, top, CROP, CROP, 0, 0, CROP, CROP);
  return canvas;
}

function blank(size) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = size;
  return canvas;
}
