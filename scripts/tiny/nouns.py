# Copyright 2026 The longllava_hf authors. Licensed under the Apache License, Version 2.0.
"""
The nouns that the small checkpoint names, and what the icon sets call them.

A line is `noun: icons`, the icons by their Unicode names; a noun without icons after it is its own. What stands after `|`
are names that only Firefox's set has (there hyphens are left out of the others). Several drawings of one thing, such as a
dog and a dog's face, are one noun.
"""

_TABLE = """
ant
apple: red-apple green-apple | redapple
airplane: airplane small-airplane
ambulance
anchor
avocado
baguette: baguette-bread
balloon
banana
basketball
bat
bathtub
battery
bear
bed
bee: honeybee
beer: beer-mug clinking-beer-mugs
bell
bicycle
bird
bomb
book: blue-book green-book orange-book closed-book
boot: womans-boot hiking-boot | boot
bow: bow-and-arrow
broccoli
bus: bus oncoming-bus
butterfly
cactus
cake: birthday-cake shortcake
camel: camel two-hump-camel | bactriancamel dromedarycamel
camera: camera camera-with-flash
candle
candy
car: automobile oncoming-automobile sport-utility-vehicle
carrot
castle | europeancastle
cat: cat cat-face black-cat | catside
caterpillar: bug
cheese: cheese-wedge
cherry: cherries
chick: baby-chick front-facing-baby-chick | frontfacingchick
chocolate: chocolate-bar
church
cloud
clover: four-leaf-clover shamrock
cocktail: cocktail-glass
coffee: hot-beverage
computer: desktop-computer
corn: ear-of-corn | earofmaize
couch: couch-and-lamp
cow: cow cow-face
crab
crocodile
croissant
crown
cucumber
dagger | daggerknife
deer
dice: game-die
dog: dog dog-face guide-dog service-dog | dogside
dolphin
donkey
door
doughnut
dragon: dragon dragon-face | dragonhead dragonside
dress
drum
duck
eagle
egg
eggplant | aubergine
elephant
envelope: envelope incoming-envelope
factory
ferris wheel: ferris-wheel
fire
fire engine: fire-engine
fish: fish tropical-fish
fishing rod: fishing-pole | fishingpoleandfish
flamingo
flashlight | electrictorch
football: american-football
fountain
fox
fries: french-fries
frog
gem: gem-stone
ghost
gift: wrapped-gift | present
giraffe
glasses
globe: globe-showing-americas globe-showing-asia-australia globe-showing-europe-africa | americasglobe asiaaustraliaglobe europeafricaglobe
goat
gorilla
grapes
guitar
hamburger
hammer
hamster | hampster
handbag: handbag
hat: womans-hat
headphones: headphone
hedgehog
helicopter
helmet: rescue-workers-helmet
high heel: high-heeled-shoe | heels
honey: honey-pot
horse: horse horse-face
hot dog: hot-dog
house: house house-with-garden | housebuilding
ice cream: ice-cream soft-ice-cream
ice skate: ice-skate
jeans
joystick
kangaroo
key: key old-key
keyboard | wiredkeyboard
kiwi: kiwi-fruit
knife: kitchen-knife | hocho
koala
ladybug: lady-beetle
lamp: light-bulb
lantern: red-paper-lantern | izakayalantern
laptop: laptop laptop-computer | personalcomputer
leaf: fallen-leaf leaf-fluttering-in-wind | leaffluttering
lemon
leopard | leopardside
lion: lion
lipstick
lizard
lock: locked locked-with-key | lock lockandkey
lollipop
magnifier: magnifying-glass-tilted-left magnifying-glass-tilted-right | leftmagnifyingglass rightmagnifyingglass
mailbox: closed-mailbox-with-lowered-flag closed-mailbox-with-raised-flag open-mailbox-with-lowered-flag open-mailbox-with-raised-flag | closedmailboxlowered closedmailboxraised openmailboxlowered openmailboxraised
meat: meat-on-bone
medal: sports-medal military-medal
megaphone
melon
microphone
microscope
milk: glass-of-milk
monkey: monkey monkey-face
moon: crescent-moon first-quarter-moon full-moon
motorcycle
mountain: snow-capped-mountain mount-fuji mountain | snowmountains
mouse: mouse mouse-face | mouseside
mushroom: mushroom brown-mushroom
octopus
onion
orange: tangerine
owl
paintbrush | lowerleftpaintbrush
palette: artist-palette
palm: palm-tree
pancakes
panda | pandaface
paperclip
parrot
peach
peacock
peanuts
pear
pencil | lowerleftpencil
penguin
pepper: hot-pepper | chilipepper
phone: mobile-phone | cellphone
piano: musical-keyboard
pig: pig pig-face | pigside
pill
pine: evergreen-tree | evergreen
pineapple
pizza | sliceofpizza
popcorn
potato: potato
printer
pumpkin: jack-o-lantern | jackolantern
rabbit: rabbit rabbit-face | bunny
radio
rainbow
rhino: rhinoceros
rice: cooked-rice
ring
robot
rocket
rooster
rose
ruler: straight-ruler
sailboat
salad: green-salad
saxophone
scissors | blackscissors
scorpion
shark
sheep: ewe
shell: spiral-shell
shield
ship
shoe: running-shoe
shrimp
skull
snail
snake
snowflake
snowman: snowman snowman-without-snow
soccer ball: soccer-ball
spaghetti
spider
spoon
squid
star
strawberry
sun: sun | whitesun
sunflower
sunglasses | darksunglasses
sushi
sword: crossed-swords
syringe
taco
taxi: taxi oncoming-taxi
teapot
telephone: telephone | blacktelephone
telescope
television
tennis ball: tennis | tennisball
tent: tent camping
tiger: tiger tiger-face | tigerside
toilet
tomato
top hat: top-hat
tornado
tractor
traffic light: vertical-traffic-light horizontal-traffic-light
train: train | train
tree: deciduous-tree | deciduoustree
trophy
truck: delivery-truck articulated-lorry
trumpet
tulip
turkey
turtle
umbrella: umbrella umbrella-with-rain-drops closed-umbrella
unicorn
violin
volcano
volleyball
watch
watermelon
whale: whale spouting-whale | spurtingwhale
wine: wine-glass
wolf | wolfface
wrench
zebra
"""

# Left out of all training, the tower's too: what is shown of them was never named to the model.
_UNSEEN = "crab anchor guitar tomato camel umbrella skull cactus violin helicopter grapes bell penguin key rose bus"


def _parse(table: str) -> dict[str, tuple[list[str], list[str]]]:
    nouns = {}
    for line in table.strip().splitlines():
        head, _, firefox = line.partition("|")
        noun, _, icons = head.partition(":")
        nouns[noun.strip()] = (icons.split() or [noun.strip()], firefox.split())
    return nouns


ICONS = _parse(_TABLE)
UNSEEN = _UNSEEN.split()
NOUNS = [noun for noun in ICONS if noun not in UNSEEN]

# The photographs among Tux Paint's stamps, by their paths without extension.
_PHOTOGRAPHS = """
amphibians/frog frog-1 = frog
birds/duck drake = duck
birds/owl = owl
birds/peacock = peacock
birds/little-penguin magellanic_penguin penguin = penguin
birds/pink_flamingo = flamingo
birds/rooster = rooster
birds/turkey = turkey
birds/rainbow-lorikeet adelaide-rosella = parrot
birds/blackbird lark magpie = bird
fish/shrimp = shrimp
fish/bluegroper coraltrout stripedfish moonwrasse butterflyfish clownfish = fish
insects/bee = bee
lizards/iguana = lizard
apes/gorilla = gorilla
aquatic/dolphin = dolphin
aquatic/whale = whale
bears/bear european-bear = bear
bovines/cow cow_white = cow
bovines/goat = goat
bovines/sheep = sheep
camel/camel dromedary = camel
cats/lion lion-2 = lion
cats/tiger tiger_sumatran = tiger
deer/deer doe = deer
dogs/dog = dog
dogs/fox = fox
mammals/elephant = elephant
equines/donkey donkey_eating = donkey
equines/horse = horse
equines/zebra = zebra
mammals/giraffe = giraffe
mammals/hedgehog = hedgehog
mammals/pig pig_golden pig_golden2 = pig
mammals/rabbit_little = rabbit
mammals/rhino_black = rhino
rodents/mouse = mouse
rodents/rabbit rabbit-2 = rabbit
marsupials/kangaroo = kangaroo
marsupials/koala = koala
hats/tophat = top hat
clothes/t_pants = jeans
fruit/apple_fuji apple_granny_smith apple_green apple_red apple_sierra_beauty = apple
fruit/avocado = avocado
fruit/banana = banana
fruit/Cherry_Stella = cherry
fruit/grapes = grapes
fruit/kiwi = kiwi
fruit/lemon = lemon
fruit/mandarine orange orange_seville = orange
fruit/pear = pear
fruit/pineapple = pineapple
fruit/strawberry Strawberry2 = strawberry
food/pizza = pizza
vegetables/broccoli = broccoli
vegetables/carrot = carrot
vegetables/chilepepper = pepper
vegetables/corn = corn
vegetables/eggplant = eggplant
vegetables/mushroom = mushroom
vegetables/onion = onion
vegetables/potato = potato
vegetables/tomato = tomato
mushrooms/cep cep-1 = mushroom
hobbies/camera_35mm = camera
brass/trumpet = trumpet
percussion/drum_tomtom_floor = drum
string/guitar2 guitar_classical guitar_electric guitar_electric_bass = guitar
string/violin = violin
household/Lightbulb = lamp
arttools/scissors_small_closed scissors_small_open = scissors
dishes/teapot = teapot
household/key = key
household/toilet = toilet
tools/hammer = hammer
tools/paintbrush_large = paintbrush
tools/wrench wrench_adjustable wrench_plumbers = wrench
medical/syringe = syringe
naturalforces/fire = fire
flowers/rose = rose
trees/liberia-palm = palm
seasonal/candle = candle
hanukkah/holiday_candle = candle
easter/butterfly = butterfly
easter/chick = chick
easter/bunny = rabbit
halloween/bat_left = bat
halloween/blackcat = cat
halloween/ghost = ghost
halloween/skull = skull
halloween/spider = spider
halloween/jackolantern_mean = pumpkin
planets/3_earth = globe
moon/moon_crescent moon_full = moon
planets/0_sun = sun
sports/basketball = basketball
sports/football = football
sports/soccer = soccer ball
sports/tennis_ball = tennis ball
sports/trophy_cup = trophy
roadsigns/stoplight_01_red stoplight_02_yellow stoplight_03_green = traffic light
town/usps_mailbox = mailbox
auto/beetle sedan sportscar2 = car
auto/truck = truck
emergency/firetruck = fire engine
flight/planes/747 = airplane
masstransit/green_korean_bus = bus
ship/chineseJunk walnutBoat = sailboat
"""


def _parse_photographs(table: str) -> dict[str, str]:
    photographs = {}
    for line in table.strip().splitlines():
        paths, _, noun = line.partition(" = ")
        first, *others = paths.split()
        folder = first.rpartition("/")[0]
        photographs |= {first: noun} | {f"{folder}/{name}": noun for name in others}
    return photographs


PHOTOGRAPHS = _parse_photographs(_PHOTOGRAPHS)
